"""What people call by hand: compare, cure, generate, sweep, ui. No stage imports them."""
