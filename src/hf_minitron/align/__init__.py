"""Alignment: supervised fine-tuning, reward labels, reward-aware preference optimization."""
