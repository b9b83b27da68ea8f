"""What pictures are measured with: judges that name them, and distances between sets of them."""
