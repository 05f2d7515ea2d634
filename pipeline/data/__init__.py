"""Models and data sets from the hub or a folder: getting and checking their files. No computing with them."""
