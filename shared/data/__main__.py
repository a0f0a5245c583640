"""`python -m shared.data list`: which data sets are here, which are missing, under which licence."""

from __future__ import annotations

import argparse

from shared.data import catalog


def main(arguments: list[str] | None = None) -> None:
    """Command line of the catalog."""
    parser = argparse.ArgumentParser(prog="python -m shared.data", description="The data sets and where they lie.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print what is here and what is missing")
    parser.parse_args(arguments)
    print("Searched:", *(f"  {folder}" for folder in catalog.folders()), sep="\n")
    places = {name: catalog.find(entry) for name, entry in catalog.CATALOG.items()}
    width = max(map(len, places))
    for name, place in places.items():
        entry = catalog.CATALOG[name]
        print(f"{name:{width}}  {'here   ' if place else 'missing'}  {entry.licence}")
        print(f"{'':{width}}  {place or 'origin: ' + entry.origin}")
    print(f"{sum(place is not None for place in places.values())} of {len(places)} sets are here.")


if __name__ == "__main__":
    main()
