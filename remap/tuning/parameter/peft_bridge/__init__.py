"""Methods that Hugging Face peft implements, on exactly the layers asked for. The only home of that library here."""
