"""What every floor may use: the logger."""
