"""The commands of `triptych`, one module each; `hw.cli` reads the words and calls them."""
