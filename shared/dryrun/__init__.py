"""What a paper's own setting would need, found out without running it: parameters, memory, work, launch files."""
