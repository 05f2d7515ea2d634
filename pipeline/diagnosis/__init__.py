"""Whether, when and why a run collapsed, and what to try: pure functions of its history. No files, no figures."""
