"""The program that creates a new op from templates, and the templates."""
