"""What every room may use: files that appear whole, threads that stay out of each other's way, words of messages."""
