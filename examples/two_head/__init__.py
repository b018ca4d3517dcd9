"""What train_two_head.py needs beside its model, its loss and its step."""
