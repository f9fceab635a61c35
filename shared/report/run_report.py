"""placeholder."""


def write_report(directory):
    directory.report.write_text("x")
