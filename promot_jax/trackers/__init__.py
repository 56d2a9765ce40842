"""Where the numbers and outputs of a run go while it trains: TensorBoard, Weights & Biases, Trackio."""
