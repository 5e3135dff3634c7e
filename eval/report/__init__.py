"""Tables and plots of runs, as files and on the terminal."""
