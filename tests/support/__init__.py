"""What tests share: tiny models, small runs, inputs, and files of data."""
