"""What runs on one device: rows of the batch, the model runner, and a worker per kind of device."""
