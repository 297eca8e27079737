"""What connects fastlora to other libraries. A library is imported when it is needed, not before."""
