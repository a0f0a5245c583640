"""GPPO, from Klear-Reasoner (arXiv 2508.07629): so far the loss alone, used by CE-GPPO and tested here."""
