"""One request, as the scheduler sees it: its sizes, its pages, its images, its record."""
