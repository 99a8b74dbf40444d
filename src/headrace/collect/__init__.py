"""Where records come from, one kind of source per file, and how their bytes become typed rows."""
