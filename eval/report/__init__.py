"""Tables and plots of runs, as files and in the terminal."""
