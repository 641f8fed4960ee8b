"""The program that lays down a new op from templates, and the templates."""
