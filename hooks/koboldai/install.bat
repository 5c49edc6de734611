@echo off
rem Puts soft prompts into KoboldAI. Copy this file into KoboldAI's folder and double-click it there.
rem It uses KoboldAI's own Python, and nothing else on this computer.
title Soft prompts for KoboldAI
setlocal DisableDelayedExpansion
cd /D "%~dp0"
set "PYTHONNOUSERSITE=1"
set "PYTHONDONTWRITEBYTECODE=1"
set "PYTHONPATH="
set "PYTHONHOME="
set "RESULT=2"

set "HOST_PREFIX="
set "HOST_PYTHON="
for %%P in ("miniconda3\python" "miniconda3" "runtime\envs\koboldai" "venv\Scripts" ".venv\Scripts") do (
    if not defined HOST_PYTHON if exist "%%~P\python.exe" (
        set "HOST_PREFIX=%%~fP"
        set "HOST_PYTHON=%%~fP\python.exe"
    )
)
if not exist "aiserver.py" goto not_here
if not defined HOST_PYTHON goto not_here
rem What KoboldAI's play.bat does by activating: the libraries that this Python needs to download watchdog.
set "PATH=%HOST_PREFIX%;%HOST_PREFIX%\Library\bin;%HOST_PREFIX%\Scripts;%PATH%"
echo KoboldAI's Python: "%HOST_PYTHON%"

set "TASK=install"
set "ANSWER="
if exist "kobold_sp_plugin.json" set /P "ANSWER=Soft prompts are installed here. Type U and Enter to remove them, or only Enter to repair or upgrade them: "
if defined ANSWER if /I "%ANSWER:~0,1%"=="U" set "TASK=uninstall"

set "WHEEL="
for %%W in ("kobold_sp_plugin-*.whl") do set "WHEEL=%%~fW"
if not defined WHEEL goto no_wheel

echo Package: "%WHEEL%"
"%HOST_PYTHON%" -c "import sys; sys.path.insert(0, sys.argv.pop(1)); from kobold_sp_plugin.cli import main; main(prog_name='kobold-sp')" "%WHEEL%" %TASK% .
set "RESULT=%ERRORLEVEL%"
if not "%RESULT%"=="0" echo That did not work; the lines above say why. KoboldAI starts as before.
goto finish

:not_here
echo This is not the folder of a KoboldAI that has been installed: "%CD%"
echo Copy install.bat into the folder with aiserver.py and play.bat, run install_requirements.bat there, then start install.bat again.
goto finish

:no_wheel
echo There is no kobold_sp_plugin-....whl here. Put it beside install.bat, then start it again.

:finish
pause
exit /B %RESULT%
