"""Recipes, one file each; `main.py --config=configs/NAME.py[:ARG]`."""
