"""Speed, side by side: what is declared, what is compared, and what the README shows."""
