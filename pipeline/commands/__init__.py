"""Commands for people, run as `reinforce COMMAND`. No stage imports a command. No command trains; it calls DVC to
train."""
