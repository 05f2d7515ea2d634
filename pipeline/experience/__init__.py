"""What a policy is made to say: batches of prompts, completions and rewards, for training and for calibration."""
