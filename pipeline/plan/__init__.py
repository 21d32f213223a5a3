"""What a dataset costs before it is made: hours, bytes and file operations per stage, by arithmetic alone."""
