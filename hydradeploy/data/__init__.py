"""Images in, network input out; numpy and Pillow only."""
