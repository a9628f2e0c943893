"""Label images and score data sets with trained networks."""
