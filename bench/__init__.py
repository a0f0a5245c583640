"""Speed, side by side with named peers: `python -m bench`. Shapes, peers and targets are fixed in `bench.shapes`."""
