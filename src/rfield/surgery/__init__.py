"""Put learned layers into an existing model, and take them out again."""
