from poweropd.cli import main

main()
