"""The stages that the commands of the analysis run: checked options, cost, run."""
