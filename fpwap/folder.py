"""What the files of a run folder are called, and the format that its own JSON files are of."""

FORMAT, FORMAT_VERSION = "fpwap-run", 1
REQUEST, MANIFEST, PROFILE, PROMPTS = "run.json", "manifest.json", "profile.json", "prompts.safetensors"
LOCK, SCRATCH, COMMITS = "run.lock", "scratch", "scratch/commits"
"""While a run lasts; a folder of a finished one holds none of them."""
BEGIN_AGAIN = "resume='never' begins the run again"
"""What to do where something that was committed is damaged."""
