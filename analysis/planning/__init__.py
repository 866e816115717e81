"""What the commands of the analysis run, one module each: `plan(options)` checks and loads."""
