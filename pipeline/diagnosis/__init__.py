"""Whether, when and why a run collapsed: pure functions of its history."""
