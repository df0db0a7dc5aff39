"""What a finished run hands on beside the paper: a data package, a research object, a tutorial."""
