"""What a training run needs to go on: found in its objects, and put back into them."""
