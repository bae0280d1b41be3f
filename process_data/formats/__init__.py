"""One module per capture format, with the layout it reads on top; ``process_data`` chooses among them."""
