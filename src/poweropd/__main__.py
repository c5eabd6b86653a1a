from poweropd.commands import main

main()
