"""What belongs to one model family or data set."""
