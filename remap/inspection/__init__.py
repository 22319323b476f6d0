"""Look at a folder of images: what is wrong with it, and a recipe to begin with."""
