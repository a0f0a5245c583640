"""What the owner of a GPU runs once: does everything that is proven on CPUs hold there, and how fast is it?"""
