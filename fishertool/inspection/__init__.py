"""What lies in a folder, told from headers; and whether it is what its report says."""
