"""qvgpt: a GPT with Q- and V-functions."""
