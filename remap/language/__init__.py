"""Vision-language models: text towers, tokenizers, class words and the classifiers that they make."""
