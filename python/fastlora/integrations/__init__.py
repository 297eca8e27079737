"""fastlora inside other libraries' models; each is imported when it is used and not before."""
