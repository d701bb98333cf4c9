"""Jinja templates of model cards; the folder is installed as ``hf_minitron.model_cards``."""
