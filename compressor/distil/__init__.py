"""Train a student on labels and on a teacher: objectives, the teacher bank and the training loop."""
