"""One verb a file, one public function each: open, check, transform, write -> Report."""
