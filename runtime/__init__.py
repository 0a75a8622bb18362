"""A model folder, an image and a prompt -> text, token by token, with the time that each stage took."""
