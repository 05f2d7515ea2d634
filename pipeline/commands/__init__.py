"""What people run by hand, as `reinforce COMMAND`. No stage imports a command, and no command trains: it asks DVC."""
