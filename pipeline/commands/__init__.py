"""What people run by hand: compare, cure, generate, sweep, ui. No stage imports a command, and no command trains: it asks DVC."""
